if __name__ != "netlathe.frontends":  # an editable checkout also has this folder on sys.path
    raise ImportError("import netlathe.frontends, not frontends")
