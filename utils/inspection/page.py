def make_page(record):
    return ""
