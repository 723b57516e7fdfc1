//! Reading LZO1X, one of the codecs of kdump-compressed dumps.

/// A decoder of all instructions, straight from the format's description.
pub fn decode(input: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut input = input.iter().copied();
    let literals = |out: &mut Vec<u8>, input: &mut dyn Iterator<Item = u8>, count: usize| {
        for _ in 0..count {
            out.push(input.next()?);
        }
        Some(())
    };
    fn length(input: &mut dyn Iterator<Item = u8>, base: usize) -> Option<usize> {
        let mut length = base;
        loop {
            match input.next()? {
                0 => length += 255,
                last => return Some(length + usize::from(last)),
            }
        }
    }
    let mut state = 0;
    let mut first = input.next()?;
    if first > 17 {
        let count = usize::from(first) - 17;
        literals(&mut out, &mut input, count)?;
        state = if count < 4 { count } else { 4 };
        first = input.next()?;
    }
    loop {
        let op = usize::from(first);
        let (distance, count, trailing) = match op {
            128.. => {
                let high = usize::from(input.next()?);
                ((high << 3) + (op >> 2 & 7) + 1, 5 + (op >> 5 & 3), op & 3)
            }
            64.. => {
                let high = usize::from(input.next()?);
                ((high << 3) + (op >> 2 & 7) + 1, 3 + (op >> 5 & 1), op & 3)
            }
            32.. => {
                let count = match op & 31 {
                    0 => length(&mut input, 33)?,
                    short => short + 2,
                };
                let word = usize::from(input.next()?) | usize::from(input.next()?) << 8;
                ((word >> 2) + 1, count, word & 3)
            }
            16.. => {
                let count = match op & 7 {
                    0 => length(&mut input, 9)?,
                    short => short + 2,
                };
                let word = usize::from(input.next()?) | usize::from(input.next()?) << 8;
                let distance = 16384 + ((op & 8) << 11) + (word >> 2);
                if distance == 16384 {
                    return (count == 3 && input.next().is_none()).then_some(out);
                }
                (distance, count, word & 3)
            }
            _ if state == 0 => {
                let count = match op {
                    0 => length(&mut input, 18)?,
                    short => short + 3,
                };
                literals(&mut out, &mut input, count)?;
                state = 4;
                first = input.next()?;
                continue;
            }
            _ => {
                let high = usize::from(input.next()?);
                match state {
                    4 => ((high << 2) + (op >> 2) + 2049, 3, op & 3),
                    _ => ((high << 2) + (op >> 2) + 1, 2, op & 3),
                }
            }
        };
        let start = out.len().checked_sub(distance)?;
        for at in start..start + count {
            out.push(out[at]);
        }
        literals(&mut out, &mut input, trailing)?;
        state = trailing;
        first = input.next()?;
    }
}
