"""The online path: from a query to its vector, without torch; and the export that it reads."""
