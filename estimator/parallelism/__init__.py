"""Several cards: what each rank holds, by strategy."""
