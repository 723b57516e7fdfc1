//! ELF notes: registers, and what a Linux kernel says about itself.

/// One note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Its name, without the NUL.
    pub name: String,
    /// n_type.
    pub kind: u32,
    /// Where its content begins, from the first note.
    pub offset: usize,
    /// Its content.
    pub content: Vec<u8>,
}

/// Takes notes apart.
///
/// # Errors
/// When they do not end where they should.
pub fn parse(bytes: &[u8]) -> Result<Vec<Note>, String> {
    let word = |at: usize| -> Result<usize, String> {
        let field = bytes.get(at..at + 4).ok_or("a note's header is cut off")?;
        Ok(u32::from_le_bytes(field.try_into().map_err(|_| "four bytes")?) as usize)
    };
    let mut notes = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let (name_bytes, content_bytes, kind) = (word(at)?, word(at + 4)?, word(at + 8)?);
        let name = bytes
            .get(at + 12..at + 12 + name_bytes)
            .ok_or("a note's name is cut off")?;
        let name = name.strip_suffix(&[0]).ok_or("a note's name has no end")?;
        let offset = at + 12 + name_bytes.next_multiple_of(4);
        let content = bytes
            .get(offset..offset + content_bytes)
            .ok_or("a note's content is cut off")?;
        notes.push(Note {
            name: String::from_utf8_lossy(name).into_owned(),
            kind: kind as u32,
            offset,
            content: content.to_vec(),
        });
        at = offset + content_bytes.next_multiple_of(4);
    }
    if at == bytes.len() {
        Ok(notes)
    } else {
        Err("the last note is not padded".into())
    }
}

/// What is expected of the notes of so many vCPUs: registers for debuggers, all registers, perhaps the kernel's own note, which
/// is returned.
///
/// # Errors
/// What is wrong with them.
pub fn check(notes: &[Note], vcpus: usize) -> Result<Option<&Note>, String> {
    let names: Vec<(&str, u32, usize)> = notes
        .iter()
        .map(|note| (note.name.as_str(), note.kind, note.content.len()))
        .collect();
    let mut expected = vec![("CORE", 1, 336); vcpus];
    expected.extend(vec![("QEMU", 0, 440); vcpus]);
    let (registers, rest) = names.split_at(expected.len().min(names.len()));
    if registers != expected || rest.len() > 1 || rest.iter().any(|note| (note.0, note.1) != ("VMCOREINFO", 0)) {
        return Err(format!("notes of {vcpus} vCPUs: {names:?}"));
    }
    for (index, pair) in notes[..vcpus].iter().zip(&notes[vcpus..]).enumerate() {
        let (status, state) = (&pair.0.content, &pair.1.content);
        let long = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        if word(status, 32) as usize != index + 1 {
            return Err(format!("thread {} of vCPU {index}", word(status, 32)));
        }
        if (word(state, 0), word(state, 4)) != (1, 440) {
            return Err(format!("state of vCPU {index}: version and size are wrong"));
        }
        // rip, rsp and rax are in both.
        for (in_status, in_state) in [(112 + 16 * 8, 136), (112 + 19 * 8, 56), (112 + 10 * 8, 8)] {
            if long(status, in_status) != long(state, in_state) {
                return Err(format!("vCPU {index}: the notes contradict each other"));
            }
        }
    }
    Ok(notes.get(2 * vcpus))
}

/// The value of a line of a VMCOREINFO note.
pub fn value<'note>(note: &'note Note, key: &str) -> Option<&'note str> {
    let text = str::from_utf8(&note.content).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
}
