"""The real images and the real docker-compose.yml, built and run without a container engine's daemon."""
