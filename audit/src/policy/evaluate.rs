//! Runs a filter on a call, as the kernel would: the parts of classic BPF that seccomp allows.

use super::compile::Instruction;

/// AUDIT_ARCH_X86_64.
pub const X86_64: u32 = 0xc000_003e;
/// AUDIT_ARCH_I386: the 32-bit calls of a 64-bit process.
pub const I386: u32 = 0x4000_0003;
/// Set in the number of an x32 call.
pub const X32_BIT: u32 = 0x4000_0000;

/// A call, as a filter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Number.
    pub number: u32,
    /// Calling convention.
    pub architecture: u32,
    /// Arguments.
    pub arguments: [u64; 6],
}

impl Call {
    /// A call of a 64-bit process.
    pub fn new(number: i64, arguments: [u64; 6]) -> Self {
        Self {
            number: number as u32,
            architecture: X86_64,
            arguments,
        }
    }

    /// A word of `struct seccomp_data`.
    fn word(&self, offset: u32) -> Option<u32> {
        match offset {
            0 => Some(self.number),
            4 => Some(self.architecture),
            // The instruction pointer.
            8 | 12 => Some(0),
            16..64 if offset.is_multiple_of(4) => {
                let argument = self.arguments[(offset as usize - 16) / 8];
                Some(if offset.is_multiple_of(8) {
                    argument as u32
                } else {
                    (argument >> 32) as u32
                })
            }
            _ => None,
        }
    }
}

/// What the program returns; `None` when it is none that the kernel would load.
pub fn evaluate(program: &[Instruction], call: &Call) -> Option<u32> {
    let (mut accumulator, mut index, mut at) = (0u32, 0u32, 0usize);
    let mut memory = [0u32; 16];
    // Every jump goes forward, so this ends.
    while let Some(instruction) = program.get(at) {
        let Instruction { code, jt, jf, k } = *instruction;
        at += 1;
        let operand = if code & 0x08 == 0 { k } else { index };
        match code & 0x07 {
            // BPF_LD
            0x00 => {
                accumulator = match code & 0xe0 {
                    0x00 => k,
                    0x20 => call.word(k)?,
                    0x60 => *memory.get(k as usize)?,
                    0x80 => 64,
                    _ => return None,
                }
            }
            // BPF_LDX
            0x01 => {
                index = match code & 0xe0 {
                    0x00 => k,
                    0x60 => *memory.get(k as usize)?,
                    0x80 => 64,
                    _ => return None,
                }
            }
            0x02 => *memory.get_mut(k as usize)? = accumulator,
            0x03 => *memory.get_mut(k as usize)? = index,
            // BPF_ALU
            0x04 => {
                accumulator = match code & 0xf0 {
                    0x00 => accumulator.wrapping_add(operand),
                    0x10 => accumulator.wrapping_sub(operand),
                    0x20 => accumulator.wrapping_mul(operand),
                    0x30 => accumulator.checked_div(operand)?,
                    0x40 => accumulator | operand,
                    0x50 => accumulator & operand,
                    0x60 => accumulator.checked_shl(operand)?,
                    0x70 => accumulator.checked_shr(operand)?,
                    0x80 => accumulator.wrapping_neg(),
                    0xa0 => accumulator ^ operand,
                    _ => return None,
                }
            }
            // BPF_JMP
            0x05 => {
                let holds = match code & 0xf0 {
                    0x00 => {
                        at += k as usize;
                        continue;
                    }
                    0x10 => accumulator == operand,
                    0x20 => accumulator > operand,
                    0x30 => accumulator >= operand,
                    0x40 => accumulator & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds { jt } else { jf });
            }
            // BPF_RET
            0x06 => return Some(if code & 0x18 == 0 { k } else { accumulator }),
            // BPF_MISC
            _ => match code & 0xf8 {
                0x00 => index = accumulator,
                0x80 => accumulator = index,
                _ => return None,
            },
        }
    }
    None
}
