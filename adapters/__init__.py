"""What providers speak: a `Chat` to a platform's own bytes, and its answers back into OpenAI's chat form."""
