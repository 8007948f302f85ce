"""The Textual front end: one screen over the command engine. It never touches a tensor."""
