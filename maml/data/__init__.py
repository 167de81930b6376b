"""Image sets as users have them, checked and turned into one tensor each."""
