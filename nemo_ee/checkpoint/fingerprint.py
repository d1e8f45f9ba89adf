def backbone_fingerprint(s):
    return "fp"
