import com.sun.management.OperatingSystemMXBean;
import java.lang.management.ManagementFactory;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.Stream;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;
import org.rocksdb.ColumnFamilyDescriptor;
import org.rocksdb.ColumnFamilyHandle;
import org.rocksdb.DBOptions;
import org.rocksdb.Options;
import org.rocksdb.RocksDB;

/**
 * Kafka Streams: one processor with a RocksDB store behind Streams' cache. It does what peer.py says of the Python peers, and reads the
 * same job. Settings besides: threads, cache_bytes (empty: Streams' default) and changelog (true or false).
 */
public final class KafkaStreamsPeer {
    private static final String STORE = "latest";
    private static final int EVENT_BYTES = 40;
    private static final int WIRE_BYTES = 65;

    private final Properties job = new Properties();
    private final long records;
    private final int length;
    private final long toleranceMs;
    private final AtomicLong count = new AtomicLong();
    private final CountDownLatch complete = new CountDownLatch(1);
    private volatile Moment steady;
    private volatile Throwable failure;

    /** Wall time, CPU time of all threads of this process, and records folded. */
    private record Moment(long wallNs, long cpuNs, long records) {
        static Moment now(long records) {
            var system = (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
            return new Moment(System.nanoTime(), system.getProcessCpuTime(), records);
        }
    }

    private KafkaStreamsPeer(Path path) throws Exception {
        try (var reader = Files.newBufferedReader(path)) {
            job.load(reader);
        }
        records = Long.parseLong(job.getProperty("records"));
        length = Integer.parseInt(job.getProperty("length"));
        toleranceMs = Long.parseLong(job.getProperty("tolerance_ms"));
    }

    public static void main(String[] args) throws Exception {
        new KafkaStreamsPeer(Path.of(args[0])).run();
    }

    private void run() throws Exception {
        var settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, job.getProperty("group"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, job.getProperty("bootstrap"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, job.getProperty("state"));
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, job.getProperty("threads"));
        settings.put(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG, "earliest");
        if (!job.getProperty("cache_bytes").isEmpty()) {
            settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, job.getProperty("cache_bytes"));
        }
        StoreBuilder<KeyValueStore<byte[], byte[]>> store =
                Stores.keyValueStoreBuilder(Stores.persistentKeyValueStore(STORE), Serdes.ByteArray(), Serdes.ByteArray())
                        .withCachingEnabled();
        store = Boolean.parseBoolean(job.getProperty("changelog")) ? store.withLoggingEnabled(Map.of()) : store.withLoggingDisabled();
        var bytes = Serdes.ByteArray().deserializer();
        var topology = new Topology();
        topology.addSource("actions", bytes, bytes, job.getProperty("topic"));
        topology.addProcessor("keep", Keep::new, "actions");
        topology.addStateStore(store, "keep");

        var streams = new KafkaStreams(topology, settings);
        streams.setUncaughtExceptionHandler(error -> {
            failure = error;
            complete.countDown();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        streams.start();
        complete.await();
        streams.close(Duration.ofSeconds(60)); // flushes and commits
        var end = Moment.now(count.get());
        if (failure != null) {
            throw new IllegalStateException("a stream thread failed", failure);
        }
        if (end.records != records) {
            throw new IllegalStateException(end.records + " records folded, the topic holds " + records);
        }
        writeResult(end);
        writeRows();
    }

    private final class Keep implements Processor<byte[], byte[], Void, Void> {
        private KeyValueStore<byte[], byte[]> rows;

        @Override
        public void init(ProcessorContext<Void, Void> context) {
            rows = context.getStateStore(STORE);
        }

        @Override
        public void process(Record<byte[], byte[]> record) {
            byte[] event = decode(record.key(), record.value(), record.timestamp());
            if (event != null) {
                byte[] before = rows.get(record.key());
                byte[] after = fold(before, event);
                if (after != before) {
                    rows.put(record.key(), after);
                }
            }
            long done = count.incrementAndGet();
            if (done == records / 3) {
                steady = Moment.now(done);
            }
            if (done == records) {
                complete.countDown();
            }
        }
    }

    /** One record's event as freshrank keeps it; null: the record does not keep the contract. */
    private byte[] decode(byte[] key, byte[] value, long appendMs) {
        if (key == null || value == null) {
            return null;
        }
        var fields = new long[10];
        int seen = value.length == WIRE_BYTES ? decodeCanonical(value, fields) : 0;
        if (seen == 0) {
            Arrays.fill(fields, 0);
            seen = decodeAny(value, fields);
        }
        final int required = 0b1101_1110; // fields 1, 2, 3, 4, 6 and 7
        if ((seen & required) != required || !isKeyOf(key, fields[1])) {
            return null;
        }
        long timeMs = fields[3];
        if (timeMs <= 0 || timeMs >= 1L << 62 || timeMs - toleranceMs > appendMs) {
            return null;
        }
        float number = (seen & 1 << 9) != 0 ? Float.intBitsToFloat((int) fields[9]) : Float.NaN;
        if (fields[6] < 1 || fields[6] > 255 || fields[7] < 1 || fields[7] > 255 || fields[8] > 65535 || Float.isInfinite(number)) {
            return null;
        }
        return ByteBuffer.allocate(EVENT_BYTES)
                .order(ByteOrder.LITTLE_ENDIAN)
                .putLong(timeMs)
                .putLong(fields[4])
                .putLong(fields[2])
                .putLong(fields[5])
                .putFloat(number)
                .putShort((short) fields[8])
                .put((byte) fields[6])
                .put((byte) fields[7])
                .array();
    }

    /** Fields 1 to 9 in order, fixed width: which were seen, as bits; 0: it is another encoding. */
    private static int decodeCanonical(byte[] value, long[] fields) {
        var wire = ByteBuffer.wrap(value).order(ByteOrder.LITTLE_ENDIAN);
        for (int n = 1; n <= 9; n++) {
            int type = n <= 5 ? 1 : 5;
            if (wire.get() != (byte) (n << 3 | type)) {
                return 0;
            }
            fields[n] = type == 1 ? wire.getLong() : wire.getInt() & 0xFFFF_FFFFL;
        }
        return 0b11_1111_1110;
    }

    /** Any other encoding, by protobuf's wire format: which of fields 1 to 9 were seen, as bits; 0: not an action. */
    private static int decodeAny(byte[] value, long[] fields) {
        var wire = ByteBuffer.wrap(value).order(ByteOrder.LITTLE_ENDIAN);
        int seen = 0;
        try {
            while (wire.hasRemaining()) {
                long tag = varint(wire);
                long n = tag >>> 3;
                long found = 0;
                switch ((int) tag & 7) {
                    case 0 -> varint(wire);
                    case 1 -> found = wire.getLong();
                    case 2 -> {
                        int size = Math.toIntExact(varint(wire));
                        wire.position(wire.position() + size);
                    }
                    case 5 -> found = wire.getInt() & 0xFFFF_FFFFL;
                    default -> {
                        return 0;
                    }
                }
                if (n == 15) {
                    return 0; // an erasure: the load has none
                }
                if (n >= 1 && n <= 9 && (tag & 7) == (n <= 5 ? 1 : 5)) {
                    fields[(int) n] = found;
                    seen |= 1 << n;
                }
            }
        } catch (java.nio.BufferUnderflowException | IllegalArgumentException | ArithmeticException error) {
            return 0;
        }
        return seen;
    }

    private static long varint(ByteBuffer wire) {
        long found = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            byte next = wire.get();
            found |= (long) (next & 0x7F) << shift;
            if (next >= 0) {
                return found;
            }
        }
        throw new IllegalArgumentException("varint of more than 10 bytes");
    }

    /** Whether the key is the user id as 16 lower-case hexadecimal digits. */
    private static boolean isKeyOf(byte[] key, long user) {
        if (key.length != 16) {
            return false;
        }
        for (int i = 0; i < 16; i++) {
            int digit = (int) (user >>> 60 - 4 * i) & 15;
            if (key[i] != (digit < 10 ? '0' + digit : 'a' + digit - 10)) {
                return false;
            }
        }
        return true;
    }

    /** The row with the event in it: ascending by (event_time_ms, event_id, bytes), each event once, the newest `length` of them. */
    private byte[] fold(byte[] row, byte[] event) {
        if (row == null) {
            return event;
        }
        int at = row.length;
        while (at > 0) { // from the newest: nearly every event belongs at the end or close to it
            int order = compare(row, at - EVENT_BYTES, event);
            if (order == 0) {
                return row;
            }
            if (order < 0) {
                break;
            }
            at -= EVENT_BYTES;
        }
        boolean isFull = row.length == length * EVENT_BYTES;
        if (isFull && at == 0) {
            return row;
        }
        int dropped = isFull ? EVENT_BYTES : 0;
        var after = new byte[row.length - dropped + EVENT_BYTES];
        System.arraycopy(row, dropped, after, 0, at - dropped);
        System.arraycopy(event, 0, after, at - dropped, EVENT_BYTES);
        System.arraycopy(row, at, after, at - dropped + EVENT_BYTES, row.length - at);
        return after;
    }

    private static final java.lang.invoke.VarHandle LONG =
            java.lang.invoke.MethodHandles.byteArrayViewVarHandle(long[].class, ByteOrder.LITTLE_ENDIAN);

    private static int compare(byte[] row, int at, byte[] event) {
        int order = Long.compare((long) LONG.get(row, at), (long) LONG.get(event, 0));
        if (order == 0) {
            order = Long.compareUnsigned((long) LONG.get(row, at + 8), (long) LONG.get(event, 8));
        }
        return order != 0 ? order : Arrays.compareUnsigned(row, at + 16, at + EVENT_BYTES, event, 16, EVENT_BYTES);
    }

    private void writeResult(Moment end) throws Exception {
        String[] pages = Files.readString(Path.of("/proc/self/statm")).split(" ");
        double residentMb = (Long.parseLong(pages[1]) - Long.parseLong(pages[2])) * 4096 / 1e6;
        var lines = "wall_s=" + (end.wallNs - steady.wallNs) / 1e9 + "\ncpu_s=" + (end.cpuNs - steady.cpuNs) / 1e9
                + "\nrecords=" + (end.records - steady.records) + "\nresident_mb=" + residentMb + "\n";
        Files.writeString(Path.of(job.getProperty("result")), lines);
    }

    /** The sampled users' rows, read from the databases that Streams closed: one a partition. */
    private void writeRows() throws Exception {
        var hex = HexFormat.of();
        var found = new Properties();
        List<String> keys = Files.readAllLines(Path.of(job.getProperty("keys")));
        List<Path> folders;
        try (Stream<Path> paths = Files.walk(Path.of(job.getProperty("state")))) {
            folders = paths.filter(path -> path.endsWith("CURRENT")).map(Path::getParent).toList();
        }
        for (Path folder : folders) {
            var families = new ArrayList<ColumnFamilyDescriptor>();
            for (byte[] name : RocksDB.listColumnFamilies(new Options(), folder.toString())) {
                families.add(new ColumnFamilyDescriptor(name));
            }
            int rows = 0; // Streams may keep more families beside the rows
            while (!Arrays.equals(families.get(rows).getName(), RocksDB.DEFAULT_COLUMN_FAMILY)) {
                rows++;
            }
            var handles = new ArrayList<ColumnFamilyHandle>();
            try (var options = new DBOptions(); var database = RocksDB.openReadOnly(options, folder.toString(), families, handles)) {
                for (String key : keys) {
                    byte[] row = database.get(handles.get(rows), hex.parseHex(key));
                    if (row != null) {
                        found.put(key, hex.formatHex(row));
                    }
                }
                handles.forEach(ColumnFamilyHandle::close);
            }
        }
        var text = new StringBuilder();
        keys.forEach(key -> text.append(key).append(' ').append(found.getProperty(key, "")).append('\n'));
        Files.write(Path.of(job.getProperty("rows")), text.toString().getBytes(StandardCharsets.US_ASCII));
    }
}
