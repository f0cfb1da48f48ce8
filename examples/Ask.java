// Asks for a code at the HTTP door, with nothing but a JDK (11 or newer), and prints the reply.
//
//   java Ask.java a@example.com
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.time.Duration;
import java.util.regex.Pattern;

public class Ask {
    static final Pattern ERROR = Pattern.compile("^\\{\"error\": ?(\\d+)[,}]"); // a JSON library of yours does it better

    public static void main(String[] words) throws Exception {
        String door = System.getenv().getOrDefault("VERIFY_HTTP_DOOR", "http://127.0.0.1:8081");
        String email = words[0].replace("\\", "\\\\").replace("\"", "\\\""); // as JSON has it
        HttpRequest request = HttpRequest.newBuilder(URI.create(door + "/get_varifycode"))
            .POST(HttpRequest.BodyPublishers.ofString("{\"email\": \"" + email + "\"}"))
            .timeout(Duration.ofSeconds(10)) // the door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set
            .build();
        HttpClient client = HttpClient.newHttpClient();
        String reply = client.send(request, HttpResponse.BodyHandlers.ofString()).body();
        System.out.println(reply);
        var error = ERROR.matcher(reply);
        System.exit(error.find() && error.group(1).equals("0") ? 0 : 1);
    }
}
