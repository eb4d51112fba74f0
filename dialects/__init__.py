"""What clients speak: each dialect turns a request body into a `Chat` and answers back into its own bytes."""
