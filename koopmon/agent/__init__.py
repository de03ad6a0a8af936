"""The agent in a training rank: taps, sampler, sender, actuator."""
