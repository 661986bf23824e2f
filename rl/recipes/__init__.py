"""Recipes. A recipe is one class for one paper; its docstring says which choices it makes, and what it departs from.

A config's `algorithm` section names the class and becomes an object of it (`rl.config.Config.algorithm`), so reading a
config imports the class. Importing torch takes a second and a half of CPU: the methods import what needs it, so that
`denoise-rl train --options` and `--dry-run` answer in a quarter of a second. A recipe in a file of your own may import
what it likes at the top.
"""
