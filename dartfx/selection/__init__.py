"""The selectors besides DART that come with dartfx, by subject; the registry names them."""
