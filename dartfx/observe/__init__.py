"""Reports, dumps and pages of what the compiler did; nothing here changes a result."""
