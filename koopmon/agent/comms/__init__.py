"""The thread that owns both sockets, and the control channel to the monitor."""
