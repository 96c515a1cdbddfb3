"""The command line. A verb parses its arguments, calls the package, and reports; folders group verbs by purpose."""
