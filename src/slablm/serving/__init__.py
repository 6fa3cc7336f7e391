"""Running a model for people and programs: writing as one watches, conversations, a server, other tools' formats.

May import: everything but `api` and `cli`.
"""
