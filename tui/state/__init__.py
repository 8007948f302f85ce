"""Everything the screen shows, as frozen data, and how events change it. Nothing here draws."""
