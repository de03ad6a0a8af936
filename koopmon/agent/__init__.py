"""The guest in a training rank: taps, sampler, sender, actuator."""
