//! Looking at what is left to do: what of it is data, what zeroes, and what need not be copied.

use super::copier::{CHUNK_BYTES, Copier, CopyError, MIN_LOOK_BYTES, Order, Piece, ZERO_STEP_BYTES};
use super::layers::Content;
use std::ops::Range;

/// Most pieces of one plan.
const MAX_PIECES: usize = 64;
/// Most questions asked for one plan.
const MAX_QUESTIONS: usize = 256;
/// How much is looked at in one go, bytes.
const LOOK_BYTES: u64 = 1 << 30;

/// What is to be copied of a part of the disk.
#[derive(Debug, Default)]
pub struct Plan {
    /// It goes up to here; nothing: there is no more.
    pub until: Option<u64>,
    /// What is to be copied, rising. Their bits are set.
    pub pieces: Vec<Piece>,
}

impl Plan {
    fn add(&mut self, range: Range<u64>, may_be_zero: bool) {
        let most = if may_be_zero { ZERO_STEP_BYTES } else { CHUNK_BYTES };
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at + most);
            self.pieces.push(Piece {
                range: at..end,
                may_be_zero,
            });
            at = end;
        }
    }
}

impl Copier {
    /// What comes next, from an offset on. The first time around (`is_first`) bits mean that nobody has looked yet: what
    /// none of the layers holds is left out. Later they mean that somebody has written there.
    ///
    /// # Errors
    /// What cannot be looked at, and where. Everything from `from` on is left, as before.
    pub async fn plan(&self, from: u64, is_first: bool) -> Result<Plan, (u64, CopyError)> {
        let mut plan = Plan::default();
        let mut questions = 0;
        let mut from = from;
        while plan.pieces.len() < MAX_PIECES && questions < MAX_QUESTIONS {
            let run = self.left.borrow().next(from, LOOK_BYTES);
            let Some(run) = run else { return Ok(plan) };
            if !is_first && run.end - run.start < MIN_LOOK_BYTES {
                from = run.end;
                plan.add(run, false);
            } else {
                from = self.look_at(run, is_first, &mut plan, &mut questions).await?;
            }
            plan.until = Some(from);
        }
        Ok(plan)
    }

    /// Plans a run of which all bits are set, as far as the bounds allow. Returns how far.
    async fn look_at(
        &self,
        run: Range<u64>,
        is_first: bool,
        plan: &mut Plan,
        questions: &mut usize,
    ) -> Result<u64, (u64, CopyError)> {
        let follows = self.options.order == Order::Following;
        let mut at = run.start;
        while at < run.end && plan.pieces.len() < MAX_PIECES && *questions < MAX_QUESTIONS {
            *questions += 1;
            // Whoever writes meanwhile sets them again; so nothing that is written is left out.
            if follows {
                self.left.borrow_mut().clear(at..run.end);
                self.under_way.set(self.under_way.get() + run.end - at);
            }
            let seen = self.first_part(at..run.end, is_first).await;
            if follows {
                self.under_way.set(self.under_way.get() - (run.end - at));
            }
            let (end, seen) = match seen {
                Ok(seen) => seen,
                Err(error) => {
                    if follows {
                        self.left.borrow_mut().set(at..run.end);
                    }
                    return Err((at, error));
                }
            };
            if follows {
                self.left.borrow_mut().set(end..run.end);
            }
            match seen {
                Seen::Left | Seen::Done => {
                    if !follows {
                        self.left.borrow_mut().clear(at..end);
                    }
                    if seen == Seen::Done {
                        self.done.set(self.done.get() + end - at);
                    }
                }
                Seen::Data | Seen::Zero => {
                    if follows {
                        self.left.borrow_mut().set(at..end);
                    }
                    plan.add(at..end, seen == Seen::Zero);
                }
            }
            at = end;
        }
        Ok(at)
    }

    /// What is to be done with the first bits of a range, which begins with a bit, and where they end.
    async fn first_part(&self, range: Range<u64>, is_first: bool) -> Result<(u64, Seen), CopyError> {
        let Range { start, end } = range;
        let looked = self.layers.content(start, end - start).await;
        let (bytes, content) = looked.map_err(CopyError::reading)?;
        let up = |bytes: u64| self.whole(start..start + bytes).end.min(end);
        let (bytes, seen) = match content {
            Content::Data => return Ok((up(bytes), Seen::Data)),
            Content::Nothing if !is_first && !self.options.leaves_out => return Ok((up(bytes), Seen::Data)),
            Content::Nothing => (bytes, Seen::Left),
            Content::Zero | Content::Empty => match self.is_zero_there(start, bytes).await? {
                (bytes, false) => (bytes, Seen::Zero),
                (bytes, true) if content == Content::Zero => (bytes, Seen::Done),
                (bytes, true) => (bytes, Seen::Left),
            },
        };
        let granularity = self.left.borrow().granularity();
        let whole = match start + bytes {
            all if all == end => end,
            part => part - part % granularity,
        };
        // A bit that is not one thing all through is copied as it is.
        Ok(if whole > start {
            (whole, seen)
        } else {
            (up(1), Seen::Data)
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// To be copied.
    Data,
    /// The target is to be made zero.
    Zero,
    /// Nothing is to be done.
    Left,
    /// Nothing is to be done any more: it counts as copied.
    Done,
}
