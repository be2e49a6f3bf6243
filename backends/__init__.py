if __name__ != "netlathe.backends":  # an editable checkout also has this folder on sys.path
    raise ImportError("import netlathe.backends, not backends")
