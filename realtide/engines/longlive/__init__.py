"""LongLive: live video that follows its prompts, one block of latent frames after the other."""
