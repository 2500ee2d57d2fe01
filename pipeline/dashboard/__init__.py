"""The local dashboard: every run below a folder, live, out of what the stages write anyway."""
