"""The page in the browser and its small server: a client of the gateway that speaks HTTP and WebRTC."""
