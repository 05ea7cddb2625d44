"""Questions asked of a model: answers scored and generated, prompts computed once."""
