//! The output fd: a stream of bytes to the caller, holes in a file where the kernel allows it.
//!
//! The fd comes from a client and can be anything that can be written. Two ways of writing cover all of it:
//! - at offsets ([`Way::Sparse`]): a file with nothing but hole after its current offset, such as a new one. Zeros are left
//!   out, so the dump of a mostly empty guest is a mostly empty file.
//! - in order ([`Way::Stream`]): pipes and sockets; files opened for appending, where the kernel ignores offsets; devices
//!   and files with old data ahead, where what is left out would not read as zero.

use crate::memory::file_offset;
use ipc::caps::DumpFd;
use ipc::dump::DumpOutput;
use ipc::memory::PAGE_BYTES;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::io;
use std::time::Duration;

/// Zeros for streams. A write's size, bytes.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

enum Way {
    /// Written at offsets from `base`; `written` is the end of the last byte that was really written, from `base`.
    Sparse { base: u64, written: u64 },
    /// Written in order.
    Stream,
}

/// Where the dump goes. Bytes are put one after the other; nothing is ever read back.
pub struct Output {
    fd: DumpFd,
    way: Way,
    /// Bytes put so far.
    position: u64,
}

impl Output {
    /// Looks at the fd. The dump starts at its current offset.
    ///
    /// # Errors
    /// The system's error.
    pub fn new(output: DumpOutput) -> io::Result<Self> {
        let DumpOutput { fd, appends } = output;
        let way = match if appends { None } else { empty_from(&fd)? } {
            Some(base) => Way::Sparse { base, written: 0 },
            None => Way::Stream,
        };
        Ok(Self { fd, way, position: 0 })
    }

    /// Bytes put so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Puts bytes; pages of zeros among them may be left out.
    ///
    /// # Errors
    /// The system's error.
    pub fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if matches!(self.way, Way::Stream) {
            self.write(bytes)?;
            self.position += bytes.len() as u64;
            return Ok(());
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let zeros = run(rest, self.position, true);
            self.position += zeros as u64;
            rest = &rest[zeros..];
            let data = run(rest, self.position, false);
            self.write(&rest[..data])?;
            self.position += data as u64;
            rest = &rest[data..];
        }
        Ok(())
    }

    /// Puts `count` zeros.
    ///
    /// # Errors
    /// The system's error.
    pub fn put_zeros(&mut self, count: u64) -> io::Result<()> {
        match self.way {
            Way::Sparse { .. } => self.position += count,
            Way::Stream => {
                let mut left = count;
                while left > 0 {
                    let step = left.min(ZEROS.len() as u64);
                    self.write(&ZEROS[..step as usize])?;
                    self.position += step;
                    left -= step;
                }
            }
        }
        Ok(())
    }

    /// Gives a file that ends in a hole its size, and leaves its offset at the end, as writing in order would have.
    ///
    /// # Errors
    /// The system's error.
    pub fn finish(mut self) -> io::Result<()> {
        if let Way::Sparse { base, written } = self.way {
            if written < self.position {
                // One byte rather than ftruncate, which the sealed filter need not allow for this.
                self.position -= 1;
                self.write(&[0])?;
                self.position += 1;
            }
            lseek(
                &self.fd,
                file_offset(base.saturating_add(self.position))?,
                Whence::SeekSet,
            )?;
        }
        Ok(())
    }

    /// Writes all of `bytes` at the current position, which stays.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.way {
            Way::Sparse { base, written } => {
                write_at(&self.fd, base.saturating_add(self.position), bytes)?;
                *written = self.position + bytes.len() as u64;
                Ok(())
            }
            Way::Stream => write(&self.fd, bytes),
        }
    }
}

/// Writes all of `bytes` in order.
///
/// # Errors
/// The system's error.
pub fn write(fd: &DumpFd, bytes: &[u8]) -> io::Result<()> {
    write_all(bytes, |rest, _| nix::unistd::write(fd, rest))
}

/// Writes all of `bytes` at an offset.
///
/// # Errors
/// The system's error.
pub fn write_at(fd: &DumpFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
    // Checked at the end, so that nothing in between is too large.
    file_offset(offset.saturating_add(bytes.len() as u64))?;
    write_all(bytes, |rest, done| {
        nix::sys::uio::pwrite(fd, rest, (offset + done as u64) as i64)
    })
}

/// Has what is left written again and again; `write` is told how much has been.
fn write_all(bytes: &[u8], write: impl Fn(&[u8], usize) -> Result<usize, Errno>) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match write(&bytes[done..], done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// How long a client's non-blocking pipe or socket is given to be read from.
const FULL: Duration = Duration::from_millis(1);

/// Waits a moment, because a non-blocking pipe or socket takes no more. The supervisor makes what clients pass block;
/// this is for a client that has taken that back. The sealed filter has no room for a call that would wait for the reader.
fn wait() {
    std::thread::park_timeout(FULL);
}

/// The current offset, when everything from there on reads as zeros until it is written.
fn empty_from(fd: &DumpFd) -> io::Result<Option<u64>> {
    let Ok(base) = lseek(fd, 0, Whence::SeekCur) else {
        return Ok(None);
    };
    match lseek(fd, base, Whence::SeekData) {
        // Only regular files answer so: no data from here on.
        Err(Errno::ENXIO) => Ok(u64::try_from(base).ok()),
        // Devices do not know the question.
        Err(_) => Ok(None),
        Ok(_) => {
            lseek(fd, base, Whence::SeekSet)?;
            Ok(None)
        }
    }
}

/// How many bytes of `bytes`, which begin at `position` of the dump, belong to blocks that are all zero (or, with
/// `zero` unset, that are not). Blocks are the file's pages as far as the dump began on one.
fn run(bytes: &[u8], position: u64, zero: bool) -> usize {
    let page = PAGE_BYTES as usize;
    let mut end = 0;
    while end < bytes.len() {
        let into_page = (position as usize + end) % page;
        let block = &bytes[end..bytes.len().min(end + page - into_page)];
        if is_zero(block) != zero {
            break;
        }
        end += block.len();
    }
    end
}

/// Whether all bytes are 0. Folding whole lines lets the compiler use vectors; the early way out is per line.
pub fn is_zero(bytes: &[u8]) -> bool {
    let lines = bytes.chunks_exact(128);
    let rest = lines.remainder();
    lines
        .into_iter()
        .all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};
    use std::os::unix::fs::MetadataExt;

    fn output(file: &std::fs::File) -> Output {
        Output::new(DumpOutput::new(file.try_clone().unwrap().into()).unwrap()).unwrap()
    }

    fn put_sample(output: &mut Output) -> Vec<u8> {
        let mut sample = vec![7; 5000];
        sample.resize(40_000, 0);
        sample.extend([9; 3]);
        output.put(&sample).unwrap();
        output.put_zeros(1 << 20).unwrap();
        sample.resize(sample.len() + (1 << 20), 0);
        sample
    }

    #[test]
    fn a_new_file_gets_holes_and_its_full_size() {
        let mut file = tempfile::tempfile().unwrap();
        let mut out = output(&file);
        let wanted = put_sample(&mut out);
        out.finish().unwrap();
        assert_eq!(file.stream_position().unwrap(), wanted.len() as u64);
        assert!(file.metadata().unwrap().blocks() * 512 < 64 << 10);
        let mut got = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut got).unwrap();
        assert!(got == wanted);
    }

    #[test]
    fn old_data_ahead_is_overwritten_with_zeros() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xaa; 4 << 20]).unwrap();
        file.seek(SeekFrom::Start(10)).unwrap();
        let mut out = output(&file);
        let wanted = put_sample(&mut out);
        out.finish().unwrap();
        let mut got = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), 4 << 20);
        assert_eq!(got[..10], [0xaa; 10]);
        assert!(got[10..10 + wanted.len()] == wanted);
        assert!(got[10 + wanted.len()..].iter().all(|byte| *byte == 0xaa));
    }

    #[test]
    fn runs_end_at_page_borders_of_the_dump() {
        let mut bytes = vec![0; 3 * 4096];
        bytes[5000] = 1;
        assert_eq!(run(&bytes, 0, true), 4096);
        assert_eq!(run(&bytes[4096..], 4096, false), 4096);
        assert_eq!(run(&bytes[100..], 100, true), 3996);
        assert_eq!(run(&bytes[8192..], 8192, true), 4096);
        assert_eq!(run(&[], 0, true), 0);
    }

    #[test]
    fn one_byte_anywhere_makes_a_block_not_zero() {
        for size in [1, 127, 128, 4095, 4096] {
            let mut block = vec![0; size];
            assert!(is_zero(&block));
            for at in [0, size / 2, size - 1] {
                block[at] = 1;
                assert!(!is_zero(&block));
                block[at] = 0;
            }
        }
    }
}
