"""A browser page for a gateway, and its small server: a client of the gateway that speaks HTTP and WebRTC."""
