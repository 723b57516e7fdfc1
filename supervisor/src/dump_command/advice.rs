//! The command that opens a dump: what docs/DUMPS.md says, in two lines.

/// For a dump of this format and name, with a line end.
pub fn text(format: &str, name: &str) -> String {
    let name = quoted(name);
    let symbols = "VMLINUX: the kernel with its debugging information";
    match format {
        "elf" => {
            format!("open it:  drgn -c {name}  or  crash VMLINUX {name}  or  gdb -c {name}   ({symbols})\n")
        }
        "win-dmp" => String::new(),
        _ => format!("open it:  drgn -c {name}  or  crash VMLINUX {name}   ({symbols})\n"),
    }
}

/// As a shell takes it for one word.
fn quoted(name: &str) -> String {
    let is_plain = |byte: char| byte.is_ascii_alphanumeric() || "/._-+=:,@%".contains(byte);
    if !name.is_empty() && name.chars().all(is_plain) {
        name.to_owned()
    } else {
        format!("'{}'", name.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_when_a_shell_would_take_them_apart() {
        assert!(text("elf", "/tmp/vm.elf").contains("gdb -c /tmp/vm.elf "));
        assert!(text("kdump-zlib", "my vm's").contains(r"drgn -c 'my vm'\''s'"));
    }
}
