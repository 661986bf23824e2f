"""Rollouts from serving engines over HTTP. Nothing they say becomes a trajectory before it was checked."""
