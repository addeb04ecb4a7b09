"""Faults on a volume in use, with every answer judged."""

from chaos.volume import Volume


def test_chaos_without_faults(context):
    """The harness itself: clients, judge, comparison of the copies, and a second round."""
    with Volume(context, 4, 1) as volume:
        volume.progress(200)
        volume.finish_round()
        volume.next_round(2)
        volume.progress(200)
        volume.finish_round()
        return f"{volume.checker.judged} requests judged"
