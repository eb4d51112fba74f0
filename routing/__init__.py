"""Who could serve: the catalogue, what each key has used, how good each model seems."""
