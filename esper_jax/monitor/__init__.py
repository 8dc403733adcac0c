"""What a run shows to people: words, views of seeds, a live view, a picture."""
