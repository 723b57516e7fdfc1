use super::*;

const RAM_BYTES: usize = 1 << 20;
const DESCRIPTOR: u64 = 0x1004;
const BUFFER: u64 = 0x2001;

fn device() -> FwCfg {
    FwCfg::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap())
}

fn select(device: &mut FwCfg, key: u16) {
    device.write(FW_CFG_PORT, 0, &key.to_le_bytes());
}

fn read(device: &mut FwCfg, count: usize) -> Vec<u8> {
    let byte = |_| {
        let mut data = [0xff];
        device.read(FW_CFG_PORT, 1, &mut data);
        data[0]
    };
    (0..count).map(byte).collect()
}

/// Has a descriptor at that address carried out.
fn start(device: &mut FwCfg, descriptor: u64) {
    device.write(FW_CFG_PORT, 4, &((descriptor >> 32) as u32).to_be_bytes());
    device.write(FW_CFG_PORT, 8, &(descriptor as u32).to_be_bytes());
}

/// Has a descriptor carried out; returns what is in its control field then.
fn dma(device: &mut FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let mut fields = Vec::new();
    fields.extend(control.to_be_bytes());
    fields.extend(length.to_be_bytes());
    fields.extend(address.to_be_bytes());
    device.ram.write_slice(&fields, GuestAddress(DESCRIPTOR)).unwrap();
    start(device, DESCRIPTOR);
    let mut answer = [0; 4];
    device.ram.read_slice(&mut answer, GuestAddress(DESCRIPTOR)).unwrap();
    u32::from_be_bytes(answer)
}

fn note(format: u16, bytes: u32, address: u64) -> Vec<u8> {
    let mut content = vec![0, 0];
    content.extend(format.to_le_bytes());
    content.extend(bytes.to_le_bytes());
    content.extend(address.to_le_bytes());
    content
}

const SELECT_FILE: u32 = (VMCOREINFO as u32) << 16 | DMA_SELECT;

fn write_file(device: &mut FwCfg, content: &[u8]) -> u32 {
    device.ram.write_slice(content, GuestAddress(BUFFER)).unwrap();
    dma(device, SELECT_FILE | DMA_WRITE, content.len() as u32, BUFFER)
}

#[test]
fn a_driver_finds_the_interface_and_the_file() {
    let mut device = device();
    assert_eq!(read(&mut device, 6), *b"QEMU\0\0", "and zeros behind it");
    select(&mut device, FEATURES);
    assert_eq!(read(&mut device, 4), [3, 0, 0, 0]);
    select(&mut device, DIRECTORY);
    let directory = read(&mut device, 4 + 64);
    assert_eq!(directory[..12], [0, 0, 0, 1, 0, 0, 0, 16, 0, 0x20, 0, 0]);
    assert_eq!(directory[12..26], *b"etc/vmcoreinfo");
    assert!(directory[26..].iter().all(|byte| *byte == 0));
    for key in [VMCOREINFO, VMCOREINFO | WRITE_CHANNEL] {
        select(&mut device, key);
        assert_eq!(read(&mut device, 18), [&INITIAL[..], &[0, 0]].concat());
    }
    for absent in [2, 0x21, 0x8000, 0xffff] {
        select(&mut device, absent);
        assert_eq!(read(&mut device, 3), [0; 3], "{absent:#x}");
    }
    let mut signature = [0; 4];
    device.read(FW_CFG_PORT, 4, &mut signature);
    assert_eq!(&signature, b"QEMU");
    device.read(FW_CFG_PORT, 8, &mut signature);
    assert_eq!(&signature, b" CFG");
}

#[test]
fn the_guest_writes_where_its_note_is_and_a_reset_forgets_it() {
    let mut device = device();
    assert_eq!(device.vmcoreinfo(), None);
    assert_eq!(write_file(&mut device, &note(1, 4096, 0x1_2345_6000)), 0);
    let expected = VmCoreInfo {
        bytes: 4096,
        address: 0x1_2345_6000,
    };
    assert_eq!(device.vmcoreinfo(), Some(expected));
    select(&mut device, VMCOREINFO);
    assert_eq!(read(&mut device, 16), note(1, 4096, 0x1_2345_6000));
    device.reset();
    assert_eq!(device.vmcoreinfo(), None);
    select(&mut device, VMCOREINFO);
    assert_eq!(read(&mut device, 16), INITIAL);
}

#[test]
fn descriptors_select_read_and_skip() {
    let mut device = device();
    let key = u32::from(SIGNATURE) << 16;
    assert_eq!(dma(&mut device, key | DMA_SELECT, 0, 0), 0);
    assert_eq!(dma(&mut device, DMA_SKIP, 1, 0), 0);
    device.ram.write_slice(&[0xff; 5], GuestAddress(BUFFER)).unwrap();
    assert_eq!(dma(&mut device, DMA_READ, 4, BUFFER), 0);
    let mut got = [0; 5];
    device.ram.read_slice(&mut got, GuestAddress(BUFFER)).unwrap();
    assert_eq!(got, *b"EMU\0\xff");
    // Far behind the end, however often.
    for _ in 0..3 {
        assert_eq!(dma(&mut device, DMA_SKIP, u32::MAX, 0), 0);
    }
    assert_eq!(read(&mut device, 1), [0]);
}

#[test]
fn half_a_file_and_another_format_are_no_note() {
    for (content, taken) in [
        (note(0, 4096, 0x1000), true),
        (note(2, 4096, 0x1000), true),
        (note(1, 4096, 0x1000)[..8].to_vec(), true),
        ([&note(1, 4096, 0x1000)[..], &[0]].concat(), false),
    ] {
        let mut device = device();
        let answer = write_file(&mut device, &content);
        assert_eq!(answer == 0, taken, "{content:?}");
        assert_eq!(device.vmcoreinfo(), None, "{content:?}");
    }
    // The port takes nothing.
    let mut device = device();
    select(&mut device, VMCOREINFO);
    device.write(FW_CFG_PORT, 1, &[7]);
    select(&mut device, VMCOREINFO);
    assert_eq!(read(&mut device, 16), INITIAL);
}

#[test]
fn a_hostile_descriptor_gets_an_error_or_nothing() {
    let mut device = device();
    let top = RAM_BYTES as u64;
    for (control, length, address) in [
        // To and from where no RAM is, and across its end.
        (SELECT_FILE | DMA_READ, 16, top),
        (SELECT_FILE | DMA_READ, 16, u64::MAX - 3),
        (SELECT_FILE | DMA_WRITE, 16, top - 8),
        // More than a file holds, and than a read may take.
        (SELECT_FILE | DMA_WRITE, 17, BUFFER),
        (SELECT_FILE | DMA_WRITE, u32::MAX, BUFFER),
        (SELECT_FILE | DMA_READ, u32::MAX, 0),
        (SELECT_FILE | DMA_READ, MAX_DMA_BYTES + 1, 0),
        // What is not the guest's to write.
        (u32::from(DIRECTORY) << 16 | DMA_SELECT | DMA_WRITE, 4, BUFFER),
        (0xffff_0000 | DMA_SELECT | DMA_WRITE, 0, BUFFER),
    ] {
        assert_eq!(
            dma(&mut device, control, length, address),
            DMA_ERROR,
            "{control:#x} {length:#x} {address:#x}"
        );
        assert_eq!(device.vmcoreinfo(), None);
    }
    for descriptor in [top, top - 15, u64::MAX - 7, 1 << 63] {
        start(&mut device, descriptor);
    }
    // The upper half holds for one descriptor only, and accesses of other sizes are nothing.
    device.write(FW_CFG_PORT, 4, &[0xff; 4]);
    start(&mut device, top);
    for size in [1, 2] {
        for offset in 0..=12 - size {
            device.write(FW_CFG_PORT, offset as u64, &[0; 2][..size]);
            device.read(FW_CFG_PORT, offset as u64, &mut [0; 2][..size]);
        }
    }
    assert_eq!(write_file(&mut device, &note(1, 1, 2)), 0);
    assert!(device.vmcoreinfo().is_some());
}
