"""Integrations of the client with voice-agent frameworks."""
