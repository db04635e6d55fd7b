import torch

from sparsetrain.ops.segments import align_segments, has_gaps, places_in_segments


def test_every_segment_starts_at_a_boundary_and_returns_to_its_place() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 0], [5, 5, 5, 5, 5, 5, 5, 5, 5], [0] * 9])
    aligned = align_segments(segments, 4)
    assert aligned.segments_bw.tolist() == [
        [1, 1, 1, 0, 2, 2, 0, 0, 3, 0, 0, 0],
        [5] * 9 + [0] * 3,
        [0] * 12,
    ]
    x = torch.randn(3, 2, 9, 3)
    moved = aligned.gather(x)
    assert torch.equal(moved[0, :, 4], x[0, :, 5])
    back = aligned.scatter(moved)
    valid = segments > 0
    assert torch.equal(back.transpose(1, 2)[valid], x.transpose(1, 2)[valid])
    assert (back.transpose(1, 2)[~valid] == 0).all()


def test_padding_inside_a_segment_takes_no_place_and_does_not_end_it() -> None:
    segments = torch.tensor([[0, 1, 1, 0, 1, 2, 0, 0, 2]])
    place, starts = places_in_segments(segments)
    assert place[segments > 0].tolist() == [0, 1, 2, 0, 1]
    assert starts.int().tolist() == [[0, 1, 0, 0, 0, 1, 0, 0, 0]]
    assert align_segments(segments, 4).segments_bw.tolist() == [[1, 1, 1, 0, 2, 2, 0, 0]]
    assert has_gaps(segments) and not has_gaps(torch.tensor([[0, 0, 1, 1, 2, 0, 3, 0]]))
