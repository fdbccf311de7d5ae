"""What is known of the licences of well-known sets; everything else is between the user and their photos."""

_FLICKR = "Photos belong to their Flickr owners."
_LICENCES = {
    "flickr8k": (
        f"{_FLICKR} The corpus (Hodosh, Young and Hockenmaier, Framing Image Description as a Ranking Task, JAIR 47, "
        "2013) is for research use, with citation."
    ),
    "flickr30k": (
        f"{_FLICKR} The corpus (Young, Lai, Hodosh and Hockenmaier, From image descriptions to visual denotations, "
        "TACL 2, 2014) is for non-commercial research and education, with citation."
    ),
    "coco": (
        f"{_FLICKR} Each has its own Creative Commons licence. The captions (Chen et al., Microsoft COCO Captions, "
        "arXiv 1504.00325, 2015) are CC BY 4.0."
    ),
}


def licence_of(name: str) -> str:
    """Return the licence note of the set `name`, "" where none is known."""
    return _LICENCES.get(name.lower(), "")
