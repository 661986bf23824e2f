"""Losses: pure functions of one record. Only `aggregate` divides."""
