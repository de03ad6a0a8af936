"""Echo networks, and the adapter that lets koopmon watch and steer them."""
