//! `unwrap` for errors that are text of several lines: prints them as they are.

/// Results of the lab.
pub trait Must<T> {
    /// The value; a test fails with the error's text.
    fn must(self) -> T;
}

impl<T> Must<T> for Result<T, String> {
    #[track_caller]
    fn must(self) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{error}"),
        }
    }
}
