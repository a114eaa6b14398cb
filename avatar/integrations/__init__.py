"""The client as what voice-agent frameworks expect of an avatar."""
