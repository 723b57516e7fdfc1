//! A kernel or initrd as it arrives: an fd that is read with pread alone, because the sealed filter has neither lseek nor
//! fstat.

use super::error::BootError;
use ipc::memory::GuestRam;
use nix::errno::Errno;
use nix::sys::uio::pread;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, GuestAddress, ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes read at once.
const CHUNK_BYTES: usize = 256 << 10;
/// Larger than any kernel or initrd, and than what a machine can load.
const MAX_FILE_BYTES: u64 = 1 << 40;

/// An open file with a position of its own.
pub struct Image {
    fd: OwnedFd,
    what: &'static str,
    bytes: u64,
    position: u64,
}

impl Image {
    /// Takes the file and finds its size. `what` names it in errors.
    ///
    /// # Errors
    /// When it cannot be read at an offset (a pipe), or is larger than any machine.
    pub fn new(fd: OwnedFd, what: &'static str) -> Result<Self, BootError> {
        let mut image = Self {
            fd,
            what,
            bytes: 0,
            position: 0,
        };
        // The size is the first offset without a byte: double until there is none, then halve the interval.
        let mut end = 1;
        while image.has_byte_at(end - 1)? {
            end *= 2;
            if end > MAX_FILE_BYTES {
                return Err(BootError::TooLarge {
                    what,
                    detail: format!("it has more than {MAX_FILE_BYTES} bytes"),
                });
            }
        }
        let (mut present, mut absent) = (end / 2, end - 1);
        while present < absent {
            let middle = present + (absent - present) / 2;
            if image.has_byte_at(middle)? {
                present = middle + 1;
            } else {
                absent = middle;
            }
        }
        image.bytes = present;
        Ok(image)
    }

    /// Size of the file.
    pub fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn has_byte_at(&self, offset: u64) -> Result<bool, BootError> {
        self.pread(&mut [0], offset).map(|count| count == 1)
    }

    fn pread(&self, buffer: &mut [u8], offset: u64) -> Result<usize, BootError> {
        let read_error = |errno| BootError::Read { what: self.what, errno };
        let at = i64::try_from(offset).map_err(|_| read_error(Errno::EOVERFLOW))?;
        loop {
            match pread(&self.fd, buffer, at) {
                Err(Errno::EINTR) => {}
                result => return result.map_err(read_error),
            }
        }
    }

    /// Fills `buffer` from `offset`. `detail` says what is missing when the file ends before.
    ///
    /// # Errors
    /// [`BootError::Truncated`] or [`BootError::Read`].
    pub fn read_at(&self, buffer: &mut [u8], offset: u64, detail: &str) -> Result<(), BootError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.pread(&mut buffer[done..], offset + done as u64)? {
                0 => {
                    return Err(BootError::Truncated {
                        what: self.what,
                        detail: detail.to_owned(),
                    });
                }
                count => done += count,
            }
        }
        Ok(())
    }

    /// Copies `bytes` of the file from `offset` to guest RAM at `address`.
    ///
    /// # Errors
    /// [`BootError::Truncated`], [`BootError::Read`], or [`BootError::Ram`] when there is no RAM.
    pub fn copy_to(&self, ram: &GuestRam, address: u64, offset: u64, bytes: u64) -> Result<(), BootError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut done = 0;
        while done < bytes {
            let length = usize::try_from(bytes - done).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            self.read_at(&mut buffer[..length], offset + done, "it shrank while it was read")?;
            ram.write_slice(&buffer[..length], GuestAddress(address + done))?;
            done += length as u64;
        }
        Ok(())
    }
}

fn io_error(error: BootError) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

impl Read for Image {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.pread(buffer, self.position).map_err(io_error)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Image {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(distance) => self.bytes.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = target.ok_or(std::io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Image {
    fn read_volatile<B: BitmapSlice>(&mut self, slice: &mut VolatileSlice<B>) -> Result<usize, VolatileMemoryError> {
        // The whole slice, or up to the end of the file: linux-loader takes a short read for a short file.
        let mut buffer = vec![0; slice.len().min(CHUNK_BYTES)];
        let mut done = 0;
        while done < slice.len() {
            let wanted = (slice.len() - done).min(CHUNK_BYTES);
            let count = self.read(&mut buffer[..wanted]).map_err(VolatileMemoryError::IOError)?;
            if count == 0 {
                break;
            }
            slice.offset(done)?.copy_from(&buffer[..count]);
            done += count;
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(contents: &[u8]) -> Image {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(contents).unwrap();
        Image::new(file.into(), "kernel image").unwrap()
    }

    #[test]
    fn the_size_is_found_without_asking_for_it() {
        for bytes in [0, 1, 2, 3, 4, 511, 512, 513, 100_000] {
            assert_eq!(image(&vec![1; bytes]).size_bytes(), bytes as u64);
        }
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len((3 << 30) + 7).unwrap();
        assert_eq!(Image::new(sparse.into(), "initrd").unwrap().size_bytes(), (3 << 30) + 7);
    }

    #[test]
    fn a_pipe_and_an_absurd_size_are_refused() {
        let (reader, _writer) = nix::unistd::pipe().unwrap();
        let error = Image::new(reader, "initrd").err().unwrap();
        assert!(error.to_string().starts_with("reading the initrd: ESPIPE"), "{error}");
        let huge = tempfile::tempfile().unwrap();
        if huge.set_len(2 << 40).is_ok() {
            assert!(matches!(
                Image::new(huge.into(), "initrd"),
                Err(BootError::TooLarge { .. })
            ));
        }
    }

    #[test]
    fn a_segment_larger_than_a_chunk_is_read_whole() {
        let contents: Vec<u8> = (0..CHUNK_BYTES + 1000).map(|index| index as u8).collect();
        let mut memory = vec![0; contents.len()];
        let mut slice = VolatileSlice::from(&mut memory[..]);
        assert_eq!(image(&contents).read_volatile(&mut slice).unwrap(), contents.len());
        assert_eq!(memory, contents);
    }

    #[test]
    fn it_reads_like_a_file() {
        let mut image = image(b"0123456789");
        let mut buffer = [0; 4];
        image.seek(SeekFrom::End(-4)).unwrap();
        image.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"6789");
        assert_eq!(image.read(&mut buffer).unwrap(), 0);
        image.seek(SeekFrom::Current(-9)).unwrap();
        image.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"1234");
        assert!(image.seek(SeekFrom::Current(-100)).is_err());
        assert!(image.read_at(&mut buffer, 7, "its end").is_err());
    }
}
