"""Whether the Hugging Face hub answers, so that those who have no network do not wait for its client to try again."""

PATIENCE = 5.0  # seconds


def reachable() -> bool:
    """One short request to the hub; false where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # slow to import, and only needed for names on the hub

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # of whichever library its client stands on
        return False
    return True
