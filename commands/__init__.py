"""The commands, a module a group. `tcsae.cli` puts them together and runs them."""
