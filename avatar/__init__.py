"""Real-time talking avatars: one picture and a stream of speech in, an endless video out."""
