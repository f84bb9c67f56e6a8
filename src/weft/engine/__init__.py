"""What the verbs share. Nothing here knows a verb; nothing is imported until it is asked for."""
