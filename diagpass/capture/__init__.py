"""Python -> functional FX graph whose nodes are marked with their module calls."""
