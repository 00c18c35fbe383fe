"""Where rows come from: experts, folders, the shapes world; and who deals them out."""
