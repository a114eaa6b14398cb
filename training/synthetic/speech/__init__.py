"""Speech with the exact time of every phone, and dialogues of two people."""
