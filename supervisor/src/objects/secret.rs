//! Secrets: bytes that stay in this process until something needs them, and that nothing prints.

use super::ObjectError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;

/// Longest file with a secret, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Text that is a secret or becomes one: shown by nothing, overwritten when it goes.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretText(Vec<u8>);

impl SecretText {
    /// Takes the text over.
    pub fn new(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretText")
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.fill(0);
        // The compiler must not take the write for useless.
        std::hint::black_box(&self.0);
    }
}

/// Where a secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// `data`.
    Data(SecretText),
    /// `file`, read once, when the object is made.
    File(PathBuf),
}

/// `format`: how it is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretFormat {
    /// As it is.
    Raw,
    /// In base64.
    Base64,
}

impl SecretFormat {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Base64 => "base64",
        }
    }
}

/// A secret.
#[derive(Debug)]
pub struct Secret {
    /// How it was written down.
    pub format: SecretFormat,
    /// The file that it came from.
    pub file: Option<PathBuf>,
    bytes: SecretText,
}

impl Secret {
    /// Reads it.
    ///
    /// # Errors
    /// When its file cannot be read or is too long, or it is not in the format that is said.
    pub fn load(source: SecretSource, format: SecretFormat) -> Result<Self, ObjectError> {
        let (written, file) = match source {
            SecretSource::Data(text) => (text, None),
            SecretSource::File(path) => (read(&path)?, Some(path)),
        };
        let bytes = match format {
            SecretFormat::Raw => written,
            SecretFormat::Base64 => {
                let text: Vec<u8> = written
                    .0
                    .iter()
                    .copied()
                    .filter(|byte| !byte.is_ascii_whitespace())
                    .collect();
                let text = SecretText(text);
                SecretText(STANDARD.decode(&text.0).map_err(|_| ObjectError::Base64)?)
            }
        };
        Ok(Self { format, file, bytes })
    }

    /// Its bytes, for the process that needs them.
    ///
    /// # Errors
    /// When there are too many for a key.
    pub fn key(&self) -> Result<ipc::secret::Secret, ipc::secret::TooLong> {
        ipc::secret::Secret::new(self.bytes.0.clone())
    }

    /// Whether there is anything to keep secret.
    pub fn is_loaded(&self) -> bool {
        !self.bytes.0.is_empty()
    }
}

fn read(path: &std::path::Path) -> Result<SecretText, ObjectError> {
    let failed = |error: std::io::Error| ObjectError::read(path, &error);
    let file = super::open_read_only(path).map_err(|errno| failed(errno.into()))?;
    let file = std::fs::File::from(file);
    // Others could make the supervisor wait.
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(std::io::Error::other("is not a regular file")));
    }
    let mut bytes = SecretText(Vec::new());
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes.0)
        .map_err(failed)?;
    if bytes.0.len() as u64 > MAX_FILE_BYTES {
        return Err(ObjectError::LongSecret(path.to_owned()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, format: SecretFormat) -> Result<Secret, ObjectError> {
        Secret::load(SecretSource::Data(SecretText::new(text)), format)
    }

    #[test]
    fn a_secret_is_decoded_and_never_shown() {
        assert_eq!(load("letmein", SecretFormat::Raw).unwrap().bytes.0, b"letmein");
        let secret = load("bGV0bWVpbg==\n", SecretFormat::Base64).unwrap();
        assert_eq!(secret.bytes.0, b"letmein");
        assert!(!format!("{secret:?}").contains("letmein"));
        let error = load("letmein!", SecretFormat::Base64).unwrap_err().to_string();
        assert!(!error.contains("letmein"), "{error}");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "from a file").unwrap();
        let secret = Secret::load(SecretSource::File(file.path().into()), SecretFormat::Raw).unwrap();
        assert_eq!(secret.bytes.0, b"from a file");
        assert!(secret.is_loaded());
    }
}
