"""The protocol between agent and monitor: messages, codec, sockets. PROTOCOL.md is normative."""
