if __name__ != "netlathe.passes":  # an editable checkout also has this folder on sys.path
    raise ImportError("import netlathe.passes, not passes")
